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
        26.65014471483433
      ]
    }
  },
  "displacement_constant_64_steps_gemma": {
    "model": "Gemma 3 270M",
    "steps": 64,
    "rows": "horizon_gemma/constants.csv step=64",
    "ranges": {
      "constant": [
        16.568281281357056,
        17.181055110040887
      ]
    }
  },
  "steps_exponents_constant": {
    "model": "SmolLM2-135M",
    "schedule": "constant",
    "rows": "horizon/steps.csv seeds!=1",
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
    "rows": "horizon_cosine/steps.csv",
    "ranges": {
      "exponent": [
        -0.39601966142764966,
        -0.24209276953054207
      ]
    }
  },
  "schedule_factor_cosine": {
    "model": "SmolLM2-135M",
    "schedule": "cosine",
    "rows": "horizon_cosine/beside.csv beside=\"schedule constant\"",
    "ranges": {
      "ratio": [
        1.7703672334167544,
        2.4623180503397144
      ]
    }
  },
  "measured_settings": {
    "model": "SmolLM2-135M",
    "rows": "horizon/constants.csv",
    "ranges": {
      "step": [
        16,
        256
      ],
      "rank": [
        1,
        128
      ],
      "strength": [
        16.0,
        724.0
      ]
    }
  },
  "cost_rank": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank\" policy=\"keep the rate\"",
    "columns": {
      "changed": "rank",
      "policy": "keep the rate",
      "pairs": 21,
      "median": 0.0007644782920370741,
      "largest": 0.00944101798298306,
      "largest_error": 0.004905569759342791
    }
  },
  "cost_strength": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"strength\" policy=\"displacement\"",
    "columns": {
      "changed": "strength",
      "policy": "displacement",
      "pairs": 30,
      "median": 0.00010139003033757255,
      "largest": 0.0049313100151337315,
      "largest_error": 0.0025890397545692855
    }
  },
  "cost_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"steps\" policy=\"displacement and steps\"",
    "columns": {
      "changed": "steps",
      "policy": "displacement and steps",
      "pairs": 15,
      "median": 0.00015416329028124695,
      "largest": 0.0026269149036757624,
      "largest_error": 0.0006674081268556024
    }
  },
  "cost_rank_strength": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank strength\" policy=\"displacement\"",
    "columns": {
      "changed": "rank strength",
      "policy": "displacement",
      "pairs": 36,
      "median": 0.0003623112981477883,
      "largest": 0.0029979523346345127,
      "largest_error": 0.0007591925819305057
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
    "row": "horizon/policies.csv changed=\"strength steps\" policy=\"displacement and steps\"",
    "columns": {
      "changed": "strength steps",
      "policy": "displacement and steps",
      "pairs": 26,
      "median": 1.2257834597591739e-05,
      "largest": 0.0024785872590550317,
      "largest_error": 0.0006306144093527061
    }
  },
  "cost_rank_strength_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank strength steps\" policy=\"displacement and steps\"",
    "columns": {
      "changed": "rank strength steps",
      "policy": "displacement and steps",
      "pairs": 32,
      "median": 0.000323077106500369,
      "largest": 0.002869968720399315,
      "largest_error": 0.0007275718331151885
    }
  },
  "cost_of_use_rslora_at_the_tuned_rate": {
    "model": "SmolLM2-135M",
    "row": "horizon/regret.csv policy=\"keep the rate\" old_rank=8 old_strength=64 old_steps=64 rank=128 strength=724 steps=64",
    "columns": {
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
  "regret_of_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=steps policy=\"displacement and steps\"",
    "columns": {
      "pairs": 15,
      "median": 0.00015416329028124695,
      "largest": 0.0026269149036757624
    }
  },
  "regret_of_rank_and_steps": {
    "model": "SmolLM2-135M",
    "row": "horizon/policies.csv changed=\"rank steps\" policy=\"displacement and steps\"",
    "columns": {
      "pairs": 21,
      "median": 0.0005353034901578457,
      "largest": 0.0047987085193019014
    }
  },
  "from_rank_8": {
    "model": "SmolLM2-135M",
    "row": "horizon/exponents.csv over=rank step=64 at=64 first=8",
    "columns": {
      "first": 8.0,
      "second": 128.0,
      "exponent": 0.06964743649191263,
      "half_width": 0.15288085710389324,
      "law_high": 0.31750341935912474
    }
  }
}
