from .masks import MaskSync, MaskSyncError, Site

__all__ = ["MaskSync", "MaskSyncError", "Site"]
