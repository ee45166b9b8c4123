"""The demonstration: a small language model trained on packed documents, beside one document at a time."""
