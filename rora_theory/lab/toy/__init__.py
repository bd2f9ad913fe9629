"""A controlled teacher-student problem, trained for many steps with factors that are nested over ranks."""
