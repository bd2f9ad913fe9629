"""What every experiment shares: its command line, run folder and progress bar."""
