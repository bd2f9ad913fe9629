"""The RoRA paper: its equations as printed, a verdict on each, its printed tables and their audit."""
