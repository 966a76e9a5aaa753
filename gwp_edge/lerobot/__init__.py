"""LeRobot v3.0 datasets on disk: read for calibration and playback, written from sessions.

Needs pyarrow and PyAV (extra ``recorded``), so a robot's own modules import it where a dataset is
opened and never before.
"""
