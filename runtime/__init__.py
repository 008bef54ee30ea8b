if __name__ != "weft.runtime":
    raise ImportError("import weft.runtime, not runtime: a bare import would load a second copy of every class")
