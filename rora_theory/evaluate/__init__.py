"""The eight commonsense tasks scored by three protocols."""
