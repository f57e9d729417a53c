"""Stages run tile by tile, exactly."""
