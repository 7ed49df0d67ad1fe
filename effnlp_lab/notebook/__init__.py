"""What a notebook calls: check, wire, meter, bench, plots, receipt."""
