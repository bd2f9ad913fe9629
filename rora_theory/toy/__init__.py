"""A controlled problem: teacher and student, trained for many steps, with factors nested over ranks."""
