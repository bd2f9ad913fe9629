"""The regime of every module of a model: signal, cross-talk and their crossing rank."""
