"""The session protocol: frames, the codec between Flower messages and frames, TLS material."""
