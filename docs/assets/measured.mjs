// Written by docs/fill.py from rora_theory/advice/measured.json.
export default {
  "displacement_constant_16_steps": {
    "model": "SmolLM2-135M",
    "steps": 16,
    "rows": "horizon/constants.csv step=16",
    "ranges": {
      "constant": [
        60.48721935777173,
        107.96593230185371
      ]
    }
  },
  "displacement_constant_64_steps": {
    "model": "SmolLM2-135M",
    "steps": 64,
    "rows": "horizon/constants.csv step=64",
    "ranges": {
      "constant": [
        87.72775374973598,
        166.64147001967595
      ]
    }
  },
  "displacement_constant_256_steps": {
    "model": "SmolLM2-135M",
    "steps": 256,
    "rows": "horizon/constants.csv step=256",
    "ranges": {
      "constant": [
        142.55862346060567,
        210.07983335714928
      ]
    }
  },
  "displacement_constant_16_steps_gemma": {
    "model": "Gemma 3 270M",
    "steps": 16,
    "rows": "horizon_gemma/constants.csv step=16",
    "ranges": {
      "constant": [
        18.463391204942422,
        23.98187475398428
      ]
    }
  },
  "displacement_constant_64_steps_gemma": {
    "model": "Gemma 3 270M",
    "steps": 64,
    "rows": "horizon_gemma/constants.csv step=64",
    "ranges": {
      "constant": [
        17.181055110040887,
        20.85876548408815
      ]
    }
  },
  "steps_exponents_constant": {
    "model": "SmolLM2-135M",
    "schedule": "constant",
    "rows": "horizon/steps.csv second=256 seeds!=1 edge=",
    "ranges": {
      "exponent": [
        -0.6254438924067403,
        -0.3765189630121024
      ]
    }
  },
  "steps_exponents_cosine": {
    "model": "SmolLM2-135M",
    "schedule": "cosine",
    "rows": "horizon_cosine/steps.csv second=256,1024 edge=",
    "ranges": {
      "exponent": [
        -0.7028100138134493,
        -0.24209276953054207
      ]
    }
  },
  "schedule_factor_cosine": {
    "model": "SmolLM2-135M",
    "schedule": "cosine",
    "rows": "horizon_cosine/comparisons.csv compared_with=\"schedule constant\"",
    "ranges": {
      "ratio": [
        1.7703672334167544,
        2.775365851514373
      ]
    }
  },
  "measured_settings": {
    "model": "SmolLM2-135M",
    "rows": "horizon/constants.csv",
    "ranges": {
      "rank": [
        1,
        128
      ],
      "strength": [
        8.0,
        724.0
      ]
    }
  },
  "measured_steps_constant": {
    "model": "SmolLM2-135M",
    "schedule": "constant",
    "rows": "horizon/constants.csv",
    "ranges": {
      "step": [
        16,
        256
      ]
    }
  },
  "measured_steps_cosine": {
    "model": "SmolLM2-135M",
    "schedule": "cosine",
    "rows": "horizon_cosine/constants.csv",
    "ranges": {
      "step": [
        16,
        1024
      ]
    }
  },
  "cost_rank": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank\" policy=\"keep the rate\"",
    "columns": {
      "changed": "rank",
      "policy": "keep the rate",
      "pairs": 22,
      "median": 0.0006295947024524962,
      "largest": 0.00944101798298306,
      "largest_error": 0.004905569759342791
    }
  },
  "cost_strength": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"strength\" policy=\"advice\"",
    "columns": {
      "changed": "strength",
      "policy": "advice",
      "pairs": 66,
      "median": 0.0005177312296829051,
      "largest": 0.009969752093218154,
      "largest_error": 0.002629079233696999
    }
  },
  "cost_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"steps\" policy=\"displacement and steps\"",
    "columns": {
      "changed": "steps",
      "policy": "displacement and steps",
      "pairs": 16,
      "median": 0.00015945084601407905,
      "largest": 0.0026269149036757624,
      "largest_error": 0.0006674081268556024
    }
  },
  "cost_rank_strength": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank strength\" policy=\"advice\"",
    "columns": {
      "changed": "rank strength",
      "policy": "advice",
      "pairs": 70,
      "median": 0.0006174290059706711,
      "largest": 0.006326273974863812,
      "largest_error": 0.0015720208213898157
    }
  },
  "cost_rank_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank steps\" policy=\"displacement and steps\"",
    "columns": {
      "changed": "rank steps",
      "policy": "displacement and steps",
      "pairs": 21,
      "median": 0.0005353034901578457,
      "largest": 0.0047987085193019014,
      "largest_error": 0.0012007554757446997
    }
  },
  "cost_strength_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"strength steps\" policy=\"advice\"",
    "columns": {
      "changed": "strength steps",
      "policy": "advice",
      "pairs": 48,
      "median": 0.00019757653177040108,
      "largest": 0.00657585077277878,
      "largest_error": 0.0018062131258376915
    }
  },
  "cost_rank_strength_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank strength steps\" policy=\"advice\"",
    "columns": {
      "changed": "rank strength steps",
      "policy": "advice",
      "pairs": 48,
      "median": 0.000714453636721124,
      "largest": 0.0034546160887358734,
      "largest_error": 0.0034764731223119157
    }
  },
  "cost_of_use_rslora_at_the_tuned_rate": {
    "model": "SmolLM2-135M",
    "row": "horizon/regret.csv policy=\"keep the rate\" old_rank=8 old_strength=64 old_steps=64 rank=128 strength=724 steps=64",
    "columns": {
      "old_rank": 8,
      "rank": 128,
      "regret": 0.13565418614546565,
      "half_width": 0.01606138337811231
    }
  },
  "best_rate": {
    "model": "SmolLM2-135M",
    "row": "horizon/best.csv step=64 rank=8 strength=64",
    "columns": {
      "best_rate": 0.0008080485377916947
    }
  },
  "from_rank_8": {
    "model": "SmolLM2-135M",
    "schedule": "constant",
    "row": "horizon/exponents.csv over=rank step=64 at=64 first=8",
    "columns": {
      "first": 8.0,
      "second": 128.0,
      "exponent": 0.06964743649191263,
      "half_width": 0.15288085710389324,
      "law_high": 0.31750341935912474
    }
  },
  "from_rank_8_cosine": {
    "model": "SmolLM2-135M",
    "schedule": "cosine",
    "row": "horizon_cosine/exponents.csv over=rank step=256 first=8 second=128",
    "columns": {
      "first": 8,
      "second": 128,
      "exponent": 0.09369798056340875,
      "half_width": 0.059446093760966004
    }
  },
  "from_rank_8_cosine_gemma": {
    "model": "Gemma 3 270M",
    "schedule": "cosine",
    "row": "horizon_gemma_cosine/exponents.csv over=rank step=256 first=8 second=128",
    "columns": {
      "first": 8,
      "second": 128,
      "exponent": 0.17069144740996392,
      "half_width": 0.050948292078220804
    }
  },
  "probe_regret_constant_same_rank": {
    "model": "SmolLM2-135M",
    "schedule": "constant",
    "rows": "tune/cases.csv is_edge=False rank=8",
    "ranges": {
      "regret": [
        -0.00014941629575212131,
        0.008873162513572341
      ],
      "is_lower_bound": [
        "False",
        "True"
      ],
      "probe_steps": [
        16,
        64
      ],
      "steps": [
        64,
        256
      ]
    },
    "medians": {
      "regret": 0.0003695372701048398
    },
    "distinct": {
      "pairs": {
        "columns": "strength seed block probe_steps rank steps",
        "number": 109
      },
      "probes": {
        "columns": "strength seed block probe_steps",
        "number": 76
      },
      "seeds": {
        "columns": "seed",
        "number": 3
      }
    }
  },
  "probe_regret_cosine_same_rank": {
    "model": "SmolLM2-135M and Gemma 3 270M",
    "schedule": "cosine",
    "rows": "tune_*/[cp]*s.csv is_edge=False rank=8 probe_steps!=5,6,7,8,9,10,11,12,13,14,15",
    "ranges": {
      "regret": [
        9.225909269661159e-06,
        0.007040879046357751
      ],
      "is_lower_bound": [
        "False",
        "False"
      ],
      "probe_steps": [
        16,
        64
      ],
      "steps": [
        64,
        1024
      ]
    },
    "medians": {
      "regret": 0.0003466076406967722
    },
    "distinct": {
      "pairs": {
        "columns": "folder probe strength seed block probe_steps rank steps",
        "number": 24
      },
      "probes": {
        "columns": "folder probe strength seed block probe_steps",
        "number": 11
      },
      "seeds": {
        "columns": "seed",
        "number": 1
      }
    }
  },
  "probe_regret_constant_other_rank": {
    "model": "SmolLM2-135M",
    "schedule": "constant",
    "rows": "tune/cases.csv is_edge=False rank!=8",
    "ranges": {
      "regret": [
        -0.0004042639359113642,
        0.007678996175728499
      ],
      "is_lower_bound": [
        "False",
        "True"
      ],
      "probe_steps": [
        16,
        64
      ],
      "steps": [
        64,
        256
      ]
    },
    "medians": {
      "regret": 0.00039546006699638553
    },
    "distinct": {
      "pairs": {
        "columns": "strength seed block probe_steps rank steps",
        "number": 109
      },
      "probes": {
        "columns": "strength seed block probe_steps",
        "number": 76
      },
      "seeds": {
        "columns": "seed",
        "number": 3
      }
    }
  },
  "probe_regret_cosine_other_rank": {
    "model": "SmolLM2-135M and Gemma 3 270M",
    "schedule": "cosine",
    "rows": "tune_*/[cp]*s.csv is_edge=False rank!=8 probe_steps!=5,6,7,8,9,10,11,12,13,14,15",
    "ranges": {
      "regret": [
        3.5315680962932916e-06,
        0.010062676790902891
      ],
      "is_lower_bound": [
        "False",
        "True"
      ],
      "probe_steps": [
        16,
        64
      ],
      "steps": [
        256,
        1024
      ]
    },
    "medians": {
      "regret": 0.0013486933921970645
    },
    "distinct": {
      "pairs": {
        "columns": "folder probe strength seed block probe_steps rank steps",
        "number": 20
      },
      "probes": {
        "columns": "folder probe strength seed block probe_steps",
        "number": 11
      },
      "seeds": {
        "columns": "seed",
        "number": 1
      }
    }
  },
  "probe_regret_short": {
    "model": "SmolLM2-135M and Gemma 3 270M",
    "schedule": "cosine",
    "rows": "tune_*/probes.csv is_edge=False probe_steps=5,6,7,8,9,10,11,12,13,14,15",
    "ranges": {
      "regret": [
        0.00028498586344050114,
        0.005538992026912881
      ],
      "is_lower_bound": [
        "False",
        "False"
      ],
      "probe_steps": [
        5,
        5
      ],
      "steps": [
        256,
        256
      ]
    },
    "medians": {
      "regret": 0.0036817294989118787
    },
    "distinct": {
      "pairs": {
        "columns": "folder probe seed probe_steps rank steps",
        "number": 4
      },
      "probes": {
        "columns": "folder probe seed probe_steps",
        "number": 2
      },
      "seeds": {
        "columns": "seed",
        "number": 1
      }
    }
  }
}
