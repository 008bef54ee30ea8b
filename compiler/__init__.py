if __name__ != "weft.compiler":
    raise ImportError("import weft.compiler, not compiler: a bare import would load a second copy of every class")
