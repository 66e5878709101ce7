"""Where rows come from: files, hubs and row formats."""
