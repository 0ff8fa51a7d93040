from tests.security.hostile import trap

__all__ = ["trap"]
