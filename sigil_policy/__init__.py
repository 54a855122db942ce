"""sigil_policy: composable ASGI policies that run in one pass."""
