"""Files written atomically, data frames and digests."""
