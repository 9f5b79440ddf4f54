// Generated from chai_export/bundle/manifest.py by `python -m chai_export.bundle.cpp_schema`: do not edit.
#pragma once

namespace chai {

// A JSON schema, for check_schema().
inline constexpr char kManifestSchema[] = R"json({
 "additionalProperties": false,
 "properties": {
  "format": {
   "const": "chai-bundle/1",
   "type": "string"
  },
  "op_version": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "dtype": {
   "enum": [
    "float32",
    "float16",
    "bfloat16"
   ],
   "type": "string"
  },
  "num_layers": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "num_query_heads": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "num_kv_heads": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "head_dim": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "value_head_dim": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "vocab_size": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "max_positions": {
   "anyOf": [
    {
     "maximum": 2147483647,
     "minimum": 1,
     "type": "integer"
    },
    {
     "type": "null"
    }
   ]
  },
  "context_length": {
   "anyOf": [
    {
     "maximum": 2147483647,
     "minimum": 1,
     "type": "integer"
    },
    {
     "type": "null"
    }
   ]
  },
  "kept_heads": {
   "items": {
    "maximum": 2147483647,
    "minimum": 1,
    "type": "integer"
   },
   "type": "array"
  },
  "kv_source_layers": {
   "anyOf": [
    {
     "items": {
      "type": "integer"
     },
     "type": "array"
    },
    {
     "type": "null"
    }
   ]
  },
  "key_bits": {
   "items": {
    "enum": [
     0,
     16,
     8,
     4
    ],
    "type": "integer"
   },
   "type": "array"
  },
  "value_bits": {
   "items": {
    "enum": [
     0,
     16,
     8,
     4
    ],
    "type": "integer"
   },
   "type": "array"
  },
  "group": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "windows": {
   "anyOf": [
    {
     "items": {
      "maximum": 2147483647,
      "minimum": 0,
      "type": "integer"
     },
     "type": "array"
    },
    {
     "type": "null"
    }
   ]
  },
  "rope": {
   "anyOf": [
    {
     "additionalProperties": false,
     "properties": {
      "types": {
       "items": {
        "type": "string"
       },
       "type": "array"
      },
      "switch_lengths": {
       "items": {
        "maximum": 2147483647,
        "minimum": 1,
        "type": "integer"
       },
       "type": "array"
      },
      "last_length": {
       "anyOf": [
        {
         "maximum": 2147483647,
         "minimum": 1,
         "type": "integer"
        },
        {
         "type": "null"
        }
       ]
      }
     },
     "type": "object"
    },
    {
     "type": "null"
    }
   ]
  },
  "probe_tokens": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "opset": {
   "maximum": 2147483647,
   "minimum": 1,
   "type": "integer"
  },
  "weights": {
   "anyOf": [
    {
     "enum": [
      "int4",
      "int8"
     ],
     "type": "string"
    },
    {
     "type": "null"
    }
   ]
  },
  "source": {
   "additionalProperties": false,
   "properties": {
    "kind": {
     "enum": [
      "hf",
      "onnx"
     ],
     "type": "string"
    },
    "name": {
     "type": "string"
    },
    "model_type": {
     "anyOf": [
      {
       "type": "string"
      },
      {
       "type": "null"
      }
     ]
    }
   },
   "required": [
    "kind",
    "name"
   ],
   "type": "object"
  },
  "proof": {
   "anyOf": [
    {
     "additionalProperties": false,
     "properties": {
      "compared": {
       "type": "string"
      },
      "max_abs_diff": {
       "type": "number"
      },
      "tolerance": {
       "type": "number"
      }
     },
     "required": [
      "compared",
      "max_abs_diff",
      "tolerance"
     ],
     "type": "object"
    },
    {
     "type": "null"
    }
   ]
  },
  "static": {
   "anyOf": [
    {
     "additionalProperties": false,
     "properties": {
      "head_maps": {
       "items": {
        "items": {
         "minimum": 0,
         "type": "integer"
        },
        "type": "array"
       },
       "type": "array"
      },
      "parameters_saved": {
       "minimum": 0,
       "type": "integer"
      },
      "parameters_before": {
       "minimum": 1,
       "type": "integer"
      },
      "flops_saved_per_token": {
       "minimum": 0,
       "type": "integer"
      }
     },
     "required": [
      "head_maps",
      "parameters_saved",
      "parameters_before",
      "flops_saved_per_token"
     ],
     "type": "object"
    },
    {
     "type": "null"
    }
   ]
  },
  "generation": {
   "additionalProperties": false,
   "properties": {
    "eos_token_ids": {
     "items": {
      "minimum": 0,
      "type": "integer"
     },
     "type": "array"
    },
    "bos_token_id": {
     "anyOf": [
      {
       "minimum": 0,
       "type": "integer"
      },
      {
       "type": "null"
      }
     ]
    },
    "pad_token_id": {
     "anyOf": [
      {
       "minimum": 0,
       "type": "integer"
      },
      {
       "type": "null"
      }
     ]
    },
    "add_bos": {
     "type": "boolean"
    },
    "has_chat_template": {
     "type": "boolean"
    },
    "top_k": {
     "anyOf": [
      {
       "type": "integer"
      },
      {
       "type": "null"
      }
     ]
    },
    "top_p": {
     "anyOf": [
      {
       "type": "number"
      },
      {
       "type": "null"
      }
     ]
    },
    "repetition_penalty": {
     "anyOf": [
      {
       "type": "number"
      },
      {
       "type": "null"
      }
     ]
    }
   },
   "type": "object"
  },
  "files": {
   "additionalProperties": {
    "additionalProperties": false,
    "properties": {
     "sha256": {
      "pattern": "^[0-9a-f]{64}$",
      "type": "string"
     },
     "size": {
      "minimum": 0,
      "type": "integer"
     }
    },
    "required": [
     "sha256",
     "size"
    ],
    "type": "object"
   },
   "type": "object"
  },
  "engines": {
   "additionalProperties": {
    "additionalProperties": false,
    "properties": {
     "backend": {
      "enum": [
       "onnxruntime",
       "tensorrt"
      ],
      "type": "string"
     },
     "runtime_version": {
      "type": "string"
     },
     "model_sha256": {
      "type": "string"
     },
     "max_batch": {
      "maximum": 2147483647,
      "minimum": 1,
      "type": "integer"
     },
     "max_seq": {
      "maximum": 2147483647,
      "minimum": 1,
      "type": "integer"
     },
     "cache_memory": {
      "anyOf": [
       {
        "minimum": 1,
        "type": "integer"
       },
       {
        "type": "null"
       }
      ]
     },
     "op_version": {
      "maximum": 2147483647,
      "minimum": 1,
      "type": "integer"
     },
     "gpu_architecture": {
      "anyOf": [
       {
        "type": "string"
       },
       {
        "type": "null"
       }
      ]
     },
     "plugin_version": {
      "anyOf": [
       {
        "type": "string"
       },
       {
        "type": "null"
       }
      ]
     },
     "files": {
      "additionalProperties": {
       "additionalProperties": false,
       "properties": {
        "sha256": {
         "pattern": "^[0-9a-f]{64}$",
         "type": "string"
        },
        "size": {
         "minimum": 0,
         "type": "integer"
        }
       },
       "required": [
        "sha256",
        "size"
       ],
       "type": "object"
      },
      "type": "object"
     },
     "settings": {
      "additionalProperties": {
       "anyOf": [
        {
         "type": "string"
        },
        {
         "type": "integer"
        },
        {
         "type": "number"
        },
        {
         "type": "boolean"
        }
       ]
      },
      "type": "object"
     },
     "created_with": {
      "type": "string"
     }
    },
    "required": [
     "backend",
     "runtime_version",
     "model_sha256",
     "max_batch",
     "max_seq",
     "op_version",
     "created_with"
    ],
    "type": "object"
   },
   "propertyNames": {
    "enum": [
     "onnxruntime",
     "tensorrt"
    ],
    "type": "string"
   },
   "type": "object"
  },
  "created_with": {
   "type": "string"
  }
 },
 "required": [
  "op_version",
  "dtype",
  "num_layers",
  "num_query_heads",
  "num_kv_heads",
  "head_dim",
  "value_head_dim",
  "vocab_size",
  "kept_heads",
  "key_bits",
  "value_bits",
  "probe_tokens",
  "opset",
  "source",
  "created_with"
 ],
 "type": "object"
})json";

}  // namespace chai
