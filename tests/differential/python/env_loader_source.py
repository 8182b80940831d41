print(__loader__.get_source("__main__"), __loader__.path, __loader__.is_package("__main__"))
