"""transformers: the quantiser (`quantizer`), loading (`models`) and timed generation (`generation`)."""
