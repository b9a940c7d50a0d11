"""What `train.py` and `finetuning.py` are made of, besides the losses."""
