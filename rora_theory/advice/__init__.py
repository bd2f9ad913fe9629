"""What to set when the rank changes, from an assumed or a measured regime."""
