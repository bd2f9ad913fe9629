"""The rank coordinate check: which quantities of a model depend on the rank under a scaling rule."""
