"""From a prompt to text: the key/value cache, sampling, chat."""
