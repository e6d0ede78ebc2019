"""From a model's folder to a model on a device: finding and checking it, adapters, quantisation, placement, GGUF import.
Safetensors only; code that comes with a model is never run."""
