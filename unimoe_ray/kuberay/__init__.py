"""Kubernetes: typed KubeRay resources, manifests from the configuration, a client for them."""
