"""The rooms of the pipeline, one package per stage, and `core`, what they all stand on."""
