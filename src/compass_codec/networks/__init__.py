"""Networks as functions of tensors, their integer twins, and how pictures of any height go through them.

Nothing here knows of bytes, files or weights on disk. ``mean_scale``, ``hyper`` and ``liff`` are the networks of the
paper; ``lean``, ``lean_liff`` and ``exact`` those of the lean backbone. ``flow``, ``strips``,
``lean_rows``, ``liff_rows``, ``places``, ``numbers``, ``mean_scale_numbers`` and ``arrays`` do not import PyTorch.
"""
