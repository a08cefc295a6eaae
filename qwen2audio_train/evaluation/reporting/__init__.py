"""Results of one run or several as tables, plots and one self-contained page."""
