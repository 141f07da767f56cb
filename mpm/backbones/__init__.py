"""Vision transformers as compositions: blocks, backbones, readouts, classifiers."""
