"""Chats with numeric token ids, and replays of chats that another server answered (docs/replay.md)."""
