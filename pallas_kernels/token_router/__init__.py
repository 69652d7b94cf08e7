"""The token router's part of a decoding step in one launch."""
