"""The network: RT-DETRv2."""
