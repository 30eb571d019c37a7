"""The compatibility layer: everything that changes another library, or stands in for one that is not installed."""
