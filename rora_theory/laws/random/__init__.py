"""Random keys, streams by name, and samplers that draw the same numbers at any block size or device count."""
