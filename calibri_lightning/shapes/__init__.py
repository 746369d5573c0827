"""The embedded default model: a small SD3-class pipeline that draws coloured shapes, and its verifiable reward."""
