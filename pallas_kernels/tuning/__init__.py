"""What the tuners of all kernels share: `search` measures tilings, `cache` keeps them in files."""
