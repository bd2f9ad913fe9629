"""Moments with standard errors, slopes with verdicts, paired differences, the best rate of a grid."""
