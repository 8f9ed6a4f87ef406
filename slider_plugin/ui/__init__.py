"""The web page: a run is set up, watched and judged in the browser. Torch is never imported here: runs are child processes."""
