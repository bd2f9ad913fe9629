"""The eight commonsense tasks: prompts, answers, scoring, and the published tables with their audit."""
