"""Who calls: keys, tokens and API keys, verified without IO."""
