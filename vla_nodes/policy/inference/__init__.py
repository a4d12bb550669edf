"""How the policy is computed: PyTorch, or exported graphs in OpenVINO or ONNX Runtime."""
