"""Jobs on a Ray cluster that runs already: what they are sent, started, followed and stopped."""
