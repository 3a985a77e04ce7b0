"""A user's folders looked at: where what lies, what the masks' values mean, and what is written about it."""
