"""From a trained model to a folder that anyone can load: merged, put in order, and proven to answer the same."""
