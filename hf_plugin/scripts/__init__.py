"""What all scripts share beside their flags: the run, the model, the output folder."""
