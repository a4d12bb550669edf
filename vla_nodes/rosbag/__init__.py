"""rosbag2 folders read, written and repaired (MCAP and sqlite3) without rosbag2."""
