"""Message passing split over ranks. Nothing is here yet; ranks share data only (`parallel/`)."""
