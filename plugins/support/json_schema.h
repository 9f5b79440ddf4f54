// Checking JSON against a JSON schema, as far as the schemas of our own files go.
#pragma once

#include "support/json.h"

namespace chai {

// Knows type, enum, const, anyOf, properties, required, additionalProperties, propertyNames, items, minimum,
// maximum and pattern (as many characters of some ranges). Throws std::runtime_error at the first place of
// `value` that does not fit.
void check_schema(const Json& value, const Json& schema);

}  // namespace chai
