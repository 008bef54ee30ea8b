if __name__ != "weft.codegen":
    raise ImportError("import weft.codegen, not codegen: a bare import would load a second copy of every class")
