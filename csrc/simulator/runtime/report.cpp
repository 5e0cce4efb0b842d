// Counters and findings as JSON.
#include <cstdio>
#include <string>

#include "simulator/runtime/process.h"

namespace fused_peft::sim {
namespace {

// Writes one JSON value after another with the commas between them.
class JsonWriter {
 public:
  void open(char bracket) { separate(), text_ += bracket, first_ = true; }
  void close(char bracket) { text_ += bracket, first_ = false; }
  void key(const char* name) { string(name), text_ += ':', first_ = true; }
  void number(uint64_t value) { separate(), text_ += std::to_string(value); }
  void number(double value) {
    separate();
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", value);
    text_ += digits;
  }
  void string(const std::string& value) {
    separate();
    text_ += '"';
    for (const char c : value) {
      if (c == '"' || c == '\\') {
        text_ += '\\', text_ += c;
      } else if (static_cast<unsigned char>(c) < 0x20) {
        char escape[8];
        std::snprintf(escape, sizeof escape, "\\u%04x", c);
        text_ += escape;
      } else {
        text_ += c;
      }
    }
    text_ += '"';
  }
  template <class T>
  void field(const char* name, const T& value) {
    key(name);
    if constexpr (std::is_convertible_v<T, std::string>)
      string(value);
    else
      number(value);
  }
  std::string take() { return std::move(text_); }

 private:
  void separate() {
    if (!first_) text_ += ',';
    first_ = false;
  }
  std::string text_;
  bool first_ = true;
};

void write_dim(JsonWriter& json, const char* name, const Dim3& dim) {
  json.key(name);
  json.open('[');
  for (const uint32_t extent : {dim.x, dim.y, dim.z}) json.number(uint64_t{extent});
  json.close(']');
}

void write_counters(JsonWriter& json, const Counters& counters) {
  json.open('{');
  json.field("kernel", counters.kernel);
  const std::pair<const char*, uint64_t> numbers[] = {
      {"launches", counters.launches},
      {"warp_instructions", counters.warp_instructions},
      {"thread_instructions", counters.thread_instructions},
      {"tensor_flop", counters.tensor_flop},
      {"global_load_bytes", counters.global_load_bytes},
      {"global_store_bytes", counters.global_store_bytes},
      {"global_atomic_bytes", counters.global_atomic_bytes},
      {"global_load_sectors", counters.global_load_sectors},
      {"global_store_sectors", counters.global_store_sectors},
      {"global_unique_load_bytes", counters.global_unique_load_bytes},
      {"global_unique_store_bytes", counters.global_unique_store_bytes},
      {"shared_load_bytes", counters.shared_load_bytes},
      {"shared_store_bytes", counters.shared_store_bytes},
      {"shared_wavefronts", counters.shared_wavefronts},
      {"shared_ideal_wavefronts", counters.shared_ideal_wavefronts},
      {"local_load_bytes", counters.local_load_bytes},
      {"local_store_bytes", counters.local_store_bytes},
      {"barriers", counters.barriers},
  };
  for (const auto& [name, value] : numbers) json.field(name, value);
  json.field("seconds", counters.seconds);
  json.key("by_class");
  json.open('{');
  for (int kind = 0; kind < int(InstrClass::kCount); ++kind)
    json.field(name_of(InstrClass(kind)), counters.by_class[size_t(kind)]);
  json.close('}');
  json.key("conflicts");
  json.open('[');
  for (const LineConflicts& line : counters.conflicts) {
    json.open('{');
    json.field("source", line.source);
    json.field("instruction", line.instruction);
    json.field("wavefronts", line.wavefronts);
    json.field("ideal_wavefronts", line.ideal_wavefronts);
    json.close('}');
  }
  json.close(']');
  json.close('}');
}

void write_finding(JsonWriter& json, const Finding& finding) {
  json.open('{');
  json.field("kind", std::string(name_of(finding.kind)));
  json.field("kernel", finding.kernel);
  write_dim(json, "block", finding.block);
  write_dim(json, "thread", finding.thread);
  json.field("instruction", finding.instruction);
  json.field("source", finding.source);
  json.field("text", finding.text);
  json.field("count", finding.count);
  json.close('}');
}

}  // namespace

std::string report_json(const Process& process) {
  JsonWriter json;
  json.open('{');
  json.field("device", process.device->key);
  json.field("message", process.last_message);
  json.field("total_findings", process.total_findings);
  json.key("counters");
  json.open('[');
  for (const Counters& counters : process.counters) write_counters(json, counters);
  json.close(']');
  json.key("findings");
  json.open('[');
  for (const Finding& finding : process.findings) write_finding(json, finding);
  json.close(']');
  json.close('}');
  return json.take();
}

}  // namespace fused_peft::sim
