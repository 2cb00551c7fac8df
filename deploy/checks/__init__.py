"""Checks of what is in deploy/, without an engine that builds images or a cluster that takes manifests.

python -m deploy.checks files        container files, compose, Kubernetes manifests
python -m deploy.checks containers   each container file's install steps in a clean root directory
"""
